"""The layer around the indexer, as modules that hold a checkpoint's weights. No weight is ever made up."""
