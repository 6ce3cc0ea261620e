"""One thread for PyTorch in the tests' own process: models are tiny, and threads that wait for each other cost more."""

import torch

torch.set_num_threads(1)
