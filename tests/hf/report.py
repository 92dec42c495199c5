"""stub"""


def write_report(rows, path): ...
