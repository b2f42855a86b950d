"""What scripts share: clients, servers, workloads, and how results are shown."""
