"""The tests run on the CPU, on every machine: extras/gpu.sh tries what only a GPU can show."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks PyTorch for a GPU
