"""The backend for any device, from torch calls only: the CPU's path and the GPU's fallback."""
