"""`python -m sightline`, also under torchrun."""

from sightline.cli.main import main

if __name__ == "__main__":
    main()
