"""`python -m lipnext`."""

from lipnext.cli import main

if __name__ == "__main__":
    main()
