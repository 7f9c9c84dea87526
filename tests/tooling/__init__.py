"""What the tests stand on: processes, servers and workers, and the tests of the tooling itself."""
