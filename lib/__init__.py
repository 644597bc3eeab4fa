"""Nouns and verbs of the project. Nothing in here reads the command line, except lib/cli/options.py."""
