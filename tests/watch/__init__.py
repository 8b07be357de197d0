"""Tests of the watch and of its board."""
