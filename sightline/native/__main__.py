"""`python -m sightline.native`: print whether the native CPU kernel is built, and for which instruction sets."""

from sightline.native.library import describe

if __name__ == "__main__":
    print(describe())
