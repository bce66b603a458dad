"""`python -m simcse_trainer`: the command `simcse-trainer`, as launchers of processes start it."""

from simcse_trainer.cli import main

if __name__ == "__main__":
    main()
