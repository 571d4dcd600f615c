"""`python -m gateway`."""

import os
import signal

if os.getpid() == 1:
    # The first process of a container gets no signal that it has no handler for, and a server's own
    # come late: until then this is what everybody else has.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

from gateway.cli import main

if __name__ == "__main__":
    main()
