"""Processes, devices, random numbers by address, signals and profiling: nothing of this project."""
