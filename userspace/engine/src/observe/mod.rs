//! What eBPF iterators and procfs tell about a tree.
