"""A program for the jail that does what the file tells it to: the test's stand-in for a parser that fails in every way."""

import os
import socket
import sys
import time

from garage.data.jail import Reply, serve


def read(path):
    order = path.read_text()
    if order == "hang":
        time.sleep(600)
    if order == "spin":
        while True:
            pass
    if order == "hog":
        return Reply(pages=(str(len(bytearray(600 << 20))),))
    if order == "die":
        os.abort()
    if order == "raise":
        raise RuntimeError("corrupt")
    if order == "flood":
        return Reply(pages=("x" * (60 << 20),))
    if order == "print":
        print("{}\n" * 100)
        os.write(1, b"not an answer\n")
    if order == "write":
        (path.parent / "written").write_text("x")
    if order == "connect":
        socket.create_connection(("127.0.0.1", int(os.environ.get("PORT", "9"))), timeout=1)
    if order == "raw connect":
        import _socket

        _socket.socket().connect(("127.0.0.1", int((path.parent / "port").read_text())))
    if order == "environment":
        return Reply(pages=(",".join(sorted(os.environ)),))
    if order == "pid":
        return Reply(pages=(str(os.getpid()),))
    return Reply(pages=(order, f"{sys.flags.safe_path}"))


if __name__ == "__main__":
    serve(read)
