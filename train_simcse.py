"""Train sentence embeddings with SimCSE: `accelerate launch train_simcse.py CONFIG.yaml`."""

import sys

from simcse_trainer.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
