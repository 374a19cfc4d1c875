"""What holds for all tests."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job: the programs that tests interrupt must hear of it
    signal.signal(signal.SIGINT, signal.default_int_handler)
