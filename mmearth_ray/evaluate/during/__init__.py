"""Evaluations beside a pretraining that goes on."""
