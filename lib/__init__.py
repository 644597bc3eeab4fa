"""Nouns and verbs of the project. Nothing in here reads the command line, except the package lib/cli."""
