"""`python -m qlora_exp` is the command `qlora-exp`."""

from qlora_exp.cli.main import main

if __name__ == "__main__":
    main()
