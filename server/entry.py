"""Where the program `ktransformers` begins: what Ctrl-C does before anybody is there to heed it."""

import signal
import sys


def main() -> None:
    """Entry point of `ktransformers`.

    Ctrl-C while modules are being read ends it, without a word; and `serve`, until the supervisor takes
    signals: an exception raised anywhere is lost where an import swallows it, and the server would start.
    """
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else, as nohup asks for, ignored
    if heeded:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ktransformers.server import cli

    if heeded and sys.argv[1:2] != ["serve"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
