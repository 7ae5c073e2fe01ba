"""The command line. Only this package prints."""


def main(args: list[str] | None = None) -> None:
    """Runs one command and ends the process with its exit status.

    Args:
        args: the words of the command; those of the process if not given.
    """
    from deltune.cli.app import run

    raise SystemExit(run(args))
