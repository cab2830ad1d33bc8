"""What is asked on the command line, before it is taken apart."""

import argparse


def value_of(option: str, words: list[str]) -> str:
    """The value of an option that decides the defaults of others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value", default="")
    return parser.parse_known_args(words)[0].value
