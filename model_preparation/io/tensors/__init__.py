"""Where tensors lie in files, and .pt and safetensors files written without loading them."""
