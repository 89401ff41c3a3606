"""`python -m lightning_indexer` is the command line."""

from lightning_indexer.cli import app

if __name__ == "__main__":
    app(prog_name="lightning-indexer")
