"""All that is to be measured on one GPU, in one command of minutes that goes on where it was."""
