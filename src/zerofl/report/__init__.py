"""`zerofl report`: runs and sweeps as one page, with the paper's figures beside the measured ones."""
