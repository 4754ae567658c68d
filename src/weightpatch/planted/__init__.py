"""Planted sources: pairs whose sources are known, to score methods of localization on."""
