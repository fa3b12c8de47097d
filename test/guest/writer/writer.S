# The writer: a guest without an operating system that writes memory as fast as it can.
#
# It is a 64 KiB ROM given to QEMU as -bios, so it runs milliseconds after power-on: the reset vector enters protected
# mode, the image is copied to RAM, the first mapGiB of memory are mapped one to one with 2 MiB pages, and the writer runs
# in 64-bit mode, ring 3, interrupts masked at both interrupt controllers for ever. Ring 3, since a software KVM back end
# runs only that natively; with IOPL 3, so that it can drive ports.
#
# Layout of the ROM and of low memory are shared with writer.go: change both.
#
#   ROM  0x0000  image, copied to 0x8000          RAM  0x6000  parameters, read again in every pass
#        0xe000  parameters, copied to 0x6000          0x7000  status
#        0xfe00  reset code                            0x10000 page tables

.intel_syntax noprefix

# Parameters: offsets from 0x6000, each 8 bytes.
.set pLowBase,    0x08  # gpa of the first range that vCPU writes go to
.set pLowPages,   0x10
.set pHighBase,   0x18  # gpa of the second: memory on a PC has a hole below 4 GiB
.set pHighPages,  0x20
.set pPassPages,  0x28  # pages written by the vCPU in a pass
.set pSpin,       0x30  # turns of an empty loop between passes
.set pFlags,      0x38
.set pSeed,       0x40
.set pDMABase,    0x48  # gpa of the range that device DMA goes to
.set pDMAPages,   0x50
.set pDMAPass,    0x58  # pages written by DMA in a pass
.set pMapGiB,     0x60
.set pEpoch,      0x68  # where it changes, the longest gap is measured anew

.set fRandom, 1         # pages in random order, else one after the other
.set fWhole,  2         # every word of the page, else its first two
.set fUniform, 4        # one repeated word (with fWhole)
.set fClock,  8         # read the clock after every page and in every turn of the empty loop

# Status: offsets from 0x7000, each 8 bytes.
.set sMagic,      0x00  # set last before the first pass
.set sPasses,     0x08
.set sPages,      0x10  # pages written by the vCPU
.set sErrors,     0x18  # pages found to hold what was never written to them
.set sErrorGPA,   0x20  # the last such page
.set sDMAPages,   0x28  # pages written by DMA
.set sCursor,     0x30  # next page in order
.set sDMAReady,   0x38  # the fw_cfg item was found
.set sClock,      0x40  # the time-stamp counter when it was last read
.set sGap,        0x48  # the longest time between two readings, in its ticks
.set sEpoch,      0x50  # of sGap
.set sCommand,    0x80  # fw_cfg DMA command: control, length (32-bit big-endian), gpa (64-bit big-endian)
.set sBuffer,     0x100 # fw_cfg directory entry being looked at

.set PARAMETERS, 0x6000
.set STATUS,     0x7000
.set IMAGE,      0x8000
.set TABLES,     0x10000
.set STACK,      0x7ff0

.section .image, "ax"
.code32
paging:
    lgdt    [gdt_pointer]
    xor     eax, eax
    mov     edi, STATUS
    mov     ecx, 1024
    rep     stosd
    # PML4 at TABLES, one PDPT behind it, then mapGiB page directories; present, writable, user.
    mov     edi, TABLES
    mov     ecx, 2048
    rep     stosd
    mov     dword ptr [TABLES], TABLES + 0x1000 + 7
    mov     ecx, [PARAMETERS + pMapGiB]
    mov     edi, TABLES + 0x1000
    mov     eax, TABLES + 0x2000 + 7
1:  mov     [edi], eax
    add     edi, 8
    add     eax, 0x1000
    loop    1b
    mov     ecx, [PARAMETERS + pMapGiB]
    shl     ecx, 9
    mov     edi, TABLES + 0x2000
    mov     eax, 0x87               # a 2 MiB page
    xor     edx, edx
2:  mov     [edi], eax
    mov     [edi + 4], edx
    add     edi, 8
    add     eax, 0x200000
    adc     edx, 0
    loop    2b
    mov     eax, cr4
    or      eax, 0x20               # PAE
    mov     cr4, eax
    mov     eax, TABLES
    mov     cr3, eax
    mov     ecx, 0xc0000080         # EFER
    rdmsr
    or      eax, 0x100              # LME
    wrmsr
    mov     eax, cr0
    and     eax, 0x1fffffff         # caches on: CD and NW are set at reset
    or      eax, 0x80000000         # PG
    mov     cr0, eax
    ljmp    0x28, offset long_mode

.code64
long_mode:
    mov     ax, 0x10
    mov     ds, ax
    mov     es, ax
    mov     ss, ax
    mov     rsp, STACK
    # Into ring 3: IOPL 3, interrupts off.
    push    0x1b
    push    STACK
    push    0x3002
    push    0x23
    lea     rax, [rip + ring3]
    push    rax
    iretq

ring3:
    mov     r15d, PARAMETERS
    mov     r14d, STATUS
    mov     r13, [r15 + pSeed]      # state of the generator, never zero
    mov     rax, 0x9e3779b97f4a7c15
    xor     r13, rax
    jnz     1f
    inc     r13
1:  xor     r11d, r11d
    cmp     qword ptr [r15 + pDMAPages], 0
    je      1f
    call    find_item
1:  lea     rsi, [rip + greeting]
    mov     dx, 0x3f8
2:  lodsb
    test    al, al
    jz      3f
    out     dx, al
    jmp     2b
3:  mov     rax, [rip + magic]
    mov     [r14 + sMagic], rax

pass:
    mov     r12, [r15 + pPassPages]
    mov     r10, [r15 + pFlags]
    mov     rax, [r15 + pEpoch]
    cmp     rax, [r14 + sEpoch]
    je      next_page
    mov     qword ptr [r14 + sGap], 0
    mov     [r14 + sEpoch], rax
next_page:
    test    r12, r12
    jz      dma
    dec     r12
    mov     r8, [r15 + pLowPages]
    mov     r9, [r15 + pHighPages]
    lea     rcx, [r8 + r9]
    test    r10, fRandom
    jz      in_order
    call    random
    mul     rcx                     # rdx = random × pages / 2^64
    jmp     have_page
in_order:
    mov     rdx, [r14 + sCursor]
    cmp     rdx, rcx
    jb      1f
    xor     edx, edx
1:  lea     rax, [rdx + 1]
    mov     [r14 + sCursor], rax
have_page:
    cmp     rdx, r8
    jae     1f
    shl     rdx, 12
    add     rdx, [r15 + pLowBase]
    jmp     2f
1:  sub     rdx, r8
    shl     rdx, 12
    add     rdx, [r15 + pHighBase]
2:  mov     rdi, rdx

    # What the page holds: two equal words (never written, or uniform) or a word and its seal, which only this page has.
    mov     rax, [rdi]
    mov     rbx, [rdi + 8]
    cmp     rax, rbx
    je      sound
    xor     rax, rdi
    not     rax
    cmp     rax, rbx
    je      sound
    inc     qword ptr [r14 + sErrors]
    mov     [r14 + sErrorGPA], rdi
sound:
    call    random
    test    r10, fUniform
    jnz     uniform
    mov     rbx, rax
    xor     rbx, rdi
    not     rbx
    mov     [rdi], rax
    mov     [rdi + 8], rbx
    test    r10, fWhole
    jz      written
    mov     ecx, 2
    mov     rbx, 0x5851f42d4c957f2d
1:  imul    rax, rbx
    inc     rax
    mov     [rdi + rcx*8], rax
    inc     ecx
    cmp     ecx, 512
    jb      1b
    jmp     written
uniform:
    mov     ecx, 512
    rep     stosq
written:
    inc     qword ptr [r14 + sPages]
    test    r10, fClock
    jz      next_page
    call    clock
    jmp     next_page

dma:
    test    r11, r11                # the item's selector, 0 where there is none
    jz      pass_done
    mov     r12, [r15 + pDMAPass]
next_dma:
    test    r12, r12
    jz      pass_done
    dec     r12
    call    random                  # where in the item to read: 0 … 60 KiB
    and     eax, 0xeffc
    mov     ecx, r11d
    shl     ecx, 16
    or      ecx, 0x0c               # select, skip
    xor     edi, edi
    call    command
    call    random
    mul     qword ptr [r15 + pDMAPages]
    shl     rdx, 12
    add     rdx, [r15 + pDMABase]
    mov     rdi, rdx
    mov     eax, 4096
    mov     ecx, 2                  # read
    call    command
    inc     qword ptr [r14 + sDMAPages]
    jmp     next_dma

pass_done:
    inc     qword ptr [r14 + sPasses]
    mov     rcx, [r15 + pSpin]
    test    rcx, rcx
    jz      pass
    test    r10, fClock
    jnz     2f
1:  dec     rcx
    jnz     1b
    jmp     pass
2:  call    clock
    dec     rcx
    jnz     2b
    jmp     pass

# clock: reads the time-stamp counter and notes how long it was not read, if that is longer than ever. Changes rax, rdx.
clock:
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    mov     rdx, [r14 + sClock]
    mov     [r14 + sClock], rax
    test    rdx, rdx
    jz      1f
    sub     rax, rdx
    cmp     rax, [r14 + sGap]
    jbe     1f
    mov     [r14 + sGap], rax
1:  ret

# random: xorshift64*, into rax. Changes rsi.
random:
    mov     rax, r13
    shr     rax, 12
    xor     r13, rax
    mov     rax, r13
    shl     rax, 25
    xor     r13, rax
    mov     rax, r13
    shr     rax, 27
    xor     r13, rax
    mov     rax, 0x2545f4914f6cdd1d
    imul    rax, r13
    ret

# command: one fw_cfg DMA command: control ecx, length eax, gpa rdi (docs/specs/fw_cfg of QEMU). Waits until it is done.
command:
    bswap   ecx
    bswap   eax
    bswap   rdi
    mov     [r14 + sCommand], ecx
    mov     [r14 + sCommand + 4], eax
    mov     [r14 + sCommand + 8], rdi
    xor     eax, eax
    mov     dx, 0x514
    out     dx, eax
    mov     eax, STATUS + sCommand
    bswap   eax
    mov     dx, 0x518
    out     dx, eax
1:  mov     eax, [r14 + sCommand]
    bswap   eax
    test    eax, 0xfffffffe         # bit 0: error
    jnz     1b
    ret

# find_item: looks for the item's name in the fw_cfg directory; r11 = its selector, or 0.
find_item:
    mov     eax, 4                  # number of entries, 32-bit big-endian
    mov     ecx, 0x0019000a         # select the directory, read
    lea     rdi, [r14 + sBuffer]
    call    command
    mov     r12d, [r14 + sBuffer]
    bswap   r12d
1:  test    r12d, r12d
    jz      3f
    dec     r12d
    mov     eax, 64                 # size 4, selector 2 (big-endian), reserved 2, name 56
    mov     ecx, 2
    lea     rdi, [r14 + sBuffer]
    call    command
    lea     rsi, [rip + item]
    lea     rdi, [r14 + sBuffer + 8]
    mov     ecx, item_end - item
    repe    cmpsb
    jne     1b
    movzx   eax, word ptr [r14 + sBuffer + 4]
    xchg    al, ah
    movzx   r11d, ax
    mov     qword ptr [r14 + sDMAReady], 1
3:  ret

magic:      .ascii "VMCKPTWR"
item:       .asciz "opt/org.vmckpt/writer"
item_end:
greeting:   .asciz "writer: ready\r\n"

.balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 0x08 code, 32-bit
    .quad 0x00cf93000000ffff        # 0x10 data
    .quad 0x00cff3000000ffff        # 0x18 data, ring 3
    .quad 0x00affb000000ffff        # 0x20 code, 64-bit, ring 3
    .quad 0x00af9b000000ffff        # 0x28 code, 64-bit
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
gdt_pointer_rom:
    .word gdt_end - gdt - 1
    .long gdt - IMAGE + 0xffff0000

.section .parameters, "a"
    .fill 4096, 1, 0

.section .reset, "ax"
.code16
reset_code:
    cli
    cld
    mov     bx, offset gdt_pointer_rom - IMAGE
    data32 lgdt cs:[bx]
    mov     eax, cr0
    or      al, 1
    mov     cr0, eax
    data32 ljmp 0x08, offset protected

.code32
protected:
    mov     ax, 0x10
    mov     ds, ax
    mov     es, ax
    mov     ss, ax
    mov     al, 0xff                # mask every interrupt
    out     0x21, al
    out     0xa1, al
    mov     esi, 0xffff0000
    mov     edi, IMAGE
    mov     ecx, offset image_dwords
    rep     movsd
    mov     esi, 0xffff0000 + 0xe000
    mov     edi, PARAMETERS
    mov     ecx, 1024
    rep     movsd
    ljmp    0x08, offset paging     # the copy: the ROM need not be mapped

.section .vector, "ax"
.code16
    jmp     reset_code
