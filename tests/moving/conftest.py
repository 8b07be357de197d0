"""The directories here are applications of readers: their tests are run by ours, in a copy."""

collect_ignore_glob = ["*/*"]
