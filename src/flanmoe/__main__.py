"""`python -m flanmoe` is the command `flanmoe`."""

from flanmoe.cli.main import main

if __name__ == "__main__":
    main()
