"""The whole way on one machine, as a person would walk it: `make demo`."""
