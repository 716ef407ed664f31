"""What every law shares: its declaration, the fitter, uncertainty and the record of how a fit was made."""
