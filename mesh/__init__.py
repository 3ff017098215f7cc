"""The shared core of Infermesh: trust, directory and link. It imports no other room."""

__version__ = "0.1.0"
