"""Serves :mod:`tests.retry.application` with ``gevent.pywsgi``, on a socket that is inherited."""

from __future__ import annotations

import signal
import socket
import sys

import gevent
from gevent import monkey

if __name__ == "__main__":
    monkey.patch_all()

    from gevent.pywsgi import WSGIServer

    from tests.retry.application import application

    listener = socket.socket(fileno=int(sys.argv[1]))
    server = WSGIServer(listener, application, log=None)
    gevent.signal_handler(signal.SIGTERM, server.stop)
    server.serve_forever()
