"""``python -m hpc_cifar``, as ``torchrun -m hpc_cifar train ...`` starts it."""

from .cli.main import run

if __name__ == "__main__":
    run()
