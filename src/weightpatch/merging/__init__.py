"""Merging of experts: what of each expert's difference goes into the merged model, and with which coefficient."""
