"""What flowkernels knows of other libraries: one file for each, imported only when asked for, and importing none."""
