"""An application of streams and slow requests, see ``tests.servers.test_streams``."""
