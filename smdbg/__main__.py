"""Run the command line: `python -m smdbg`."""

from smdbg.cli import main

if __name__ == "__main__":
    main()
