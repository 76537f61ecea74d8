"""Ways to a virtual machine: one small interface, one file for each hypervisor interface."""
