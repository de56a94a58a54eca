"""What this machine is: devices, their facts, memory."""
