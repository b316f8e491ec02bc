"""Make, train and judge the tiny model."""
