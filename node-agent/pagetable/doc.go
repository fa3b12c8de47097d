// Package pagetable reads and steers another process's page tables: userfaultfd, PAGEMAP_SCAN, the classic pagemap, the
// list of mappings, and the memory itself.
//
// In go a process id, or a userfaultfd created inside that process, and ranges of its virtual addresses (for QEMU:
// host-virtual addresses, HVA). Out come typed facts about those ranges. The package decides nothing: what is tracked, when
// and why is the business of its callers.
//
// What must hold: every range is page-aligned and lies in the process meant; nothing here remembers which ranges are
// registered or protected, because the process itself is the only true record of that (see [Mapping]).
//
// Raw ioctls and unsafe pointers to kernel structures live here and in package inject alone. Every constant names the kernel
// header that it comes from.
package pagetable
