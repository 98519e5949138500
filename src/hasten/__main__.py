"""`python -m hasten` is the command line where the console script is not on the path."""

from hasten.cli import main

if __name__ == "__main__":
    main()
