"""hpc-cifar: one YAML file becomes a resumable, distributed CIFAR-10 training job."""

__version__ = "0.1.0"
