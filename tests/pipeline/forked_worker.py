"""Stands in for Ray's setup_worker.py: has the fork server make the worker, and lives for as long as that does."""

import json
import os
import socket
import sys

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["DIFFEDIT_TEST_FORKS"])
        wanted = {"kind": "worker", "arguments": sys.argv[1:], "environment": dict(os.environ)}
        server.sendall(json.dumps(wanted).encode() + b"\n")
        while server.recv(100):
            pass
