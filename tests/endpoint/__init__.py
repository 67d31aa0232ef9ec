"""Tests of the served endpoint, which share one cluster: a package, so that its conftest has a name of its own."""
