# From the loader to Rust. AT&T syntax, for its far jumps.
#
# The 32-bit code names addresses by the linker script's absolute symbols: it runs where the image is loaded.

    .section .text.boot, "ax", @progbits

# ---- PVH: 32-bit protected mode, flat, no paging, no stack; EBX points to hvm_start_info ----

    .code32
    .globl pvh_start
pvh_start:
    cld
    movl $boot_stack_top_physical, %esp
    # An identity map of the first 4 GiB, in pages of 2 MiB.
    movl $boot_directories_physical, %edi
    xorl %ecx, %ecx
1:  movl %ecx, %eax
    shll $21, %eax
    orl $0x83, %eax
    movl %eax, (%edi,%ecx,8)
    movl $0, 4(%edi,%ecx,8)
    incl %ecx
    cmpl $2048, %ecx
    jb 1b
    movl $boot_pdpt_physical, %edi
    leal 3 + boot_directories_physical, %eax
    xorl %ecx, %ecx
2:  movl %eax, (%edi,%ecx,8)
    movl $0, 4(%edi,%ecx,8)
    addl $0x1000, %eax
    incl %ecx
    cmpl $4, %ecx
    jb 2b
    leal 3 + boot_pdpt_physical, %eax
    movl %eax, boot_pml4_physical
    movl $0, boot_pml4_physical + 4

    # The pseudo-descriptor's base is not the linker's to fill in.
    movl $boot_gdt_physical, boot_gdtr_physical + 2
    movl $0, boot_gdtr_physical + 6
    movl $boot_pml4_physical, %edi
    movl $boot_gdtr_physical, %ebp
    # Falls through with EDI = root, EBP = pseudo-descriptor, EBX = start info (zero for another processor).

    .globl protected_mode
protected_mode:
    movl %cr4, %eax
    orl $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl %edi, %cr3
    movl $0xc0000080, %ecx          # EFER
    rdmsr
    orl $0x901, %eax                # SCE, LME, NXE
    wrmsr
    movl %cr0, %eax
    andl $~0x6000000c, %eax         # not CD, NW, TS, EM
    orl $0x80010023, %eax           # PG, WP, NE, MP, PE
    movl %eax, %cr0
    lgdt (%ebp)
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    ljmpl $0x10, $long_mode_physical

# ---- 64-bit supervisor mode from here on; with a PVM hypervisor, PVM's ----

    .code64
    .globl long_mode
long_mode:
    testl %ebx, %ebx
    jz another_processor
    movl %ebx, %esi
    movl $1, %edi                   # by PVH
    jmp first_processor

# The 64-bit Linux boot protocol: RSI points to boot_params; a stack is not promised.
    .globl start64
start64:
    cld
    xorl %edi, %edi                 # by Linux's protocol
    movq %cr4, %rax
    orq $0x620, %rax
    movq %rax, %cr4
    movq %cr0, %rax
    andq $~0xc, %rax
    orq $0x10022, %rax
    movq %rax, %cr0
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x801, %eax                # SCE, NXE
    wrmsr

first_processor:
    leaq boot_stack_top(%rip), %rsp
    movq %rdi, %r12
    movq %rsi, %r13
    xorl %edi, %edi
    call relocate
    movq %r12, %rdi
    movq %r13, %rsi
    call {boot_main}
    ud2

# relocate(delta): every word that holds an address gets the link-time address plus delta. All that Rust's code keeps
# in memory as addresses is among them, so it runs for the first time before any Rust code. Called where the image
# is loaded.
    .globl relocate
relocate:
    leaq rela_start(%rip), %rax
    leaq rela_end(%rip), %rcx
1:  cmpq %rcx, %rax
    jae 2f
    cmpl $8, 8(%rax)                # R_X86_64_RELATIVE: the only kind that the linker leaves
    jne 3f
    movq 16(%rax), %rdx
    addq %rdi, %rdx
    movq (%rax), %r8
    movq %rdx, (%r8)
    addq $24, %rax
    jmp 1b
2:  ret
3:  ud2

# jump_up(function, stack): leaves the place where the image is loaded for good.
    .globl jump_up
jump_up:
    movq %rsi, %rsp
    xorl %ebp, %ebp
    call *%rdi
    ud2

# Another processor, from the trampoline: at the loaded address still. The stack and the way up are in words that the
# first processor wrote.
another_processor:
    movq ap_stack(%rip), %rsp
    movq ap_entry(%rip), %rax
    xorl %ebp, %ebp
    call *%rax
    ud2

    .section .data.boot, "aw", @progbits
    .balign 16
    .globl boot_gdt
boot_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 0x08: 32-bit code
    .quad 0x00af9b000000ffff        # 0x10: 64-bit code
    .quad 0x00cf93000000ffff        # 0x18: data
boot_gdt_end:
    .globl boot_gdtr
boot_gdtr:
    .word boot_gdt_end - boot_gdt - 1
    .quad 0
    .balign 8
    .globl ap_stack
ap_stack:
    .quad 0
    .globl ap_entry
ap_entry:
    .quad 0

    .section .bss.boot, "aw", @nobits
    .balign 4096
    .globl boot_pml4
boot_pml4:
    .skip 4096
    .globl boot_pdpt
boot_pdpt:
    .skip 4096
    .globl boot_directories
boot_directories:
    .skip 4 * 4096
    .skip 64 * 1024
    .globl boot_stack_top
boot_stack_top:

# ---- The trampoline: copied below 1 MiB, entered in real mode with CS = its page ----

    .section .rodata.trampoline, "a", @progbits
    .globl trampoline
    .globl trampoline_end
    .globl trampoline_gdtr
    .globl trampoline_jump
    .globl trampoline_root
    .globl trampoline_protected
trampoline:
    .code16
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdtr - trampoline
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl *(trampoline_jump - trampoline)
    .code32
    .globl trampoline_32
trampoline_32:
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    # Where this page is, was put into EBP's constant when it was copied.
    .byte 0xbd                      # movl $..., %ebp
    .globl trampoline_base
trampoline_base:
    .long 0
    movl trampoline_root - trampoline(%ebp), %edi
    movl trampoline_protected - trampoline(%ebp), %eax
    addl $trampoline_gdtr - trampoline, %ebp
    xorl %ebx, %ebx
    jmp *%eax
    .balign 8
trampoline_gdtr:
    .word 31
    .quad 0
trampoline_jump:
    .long 0
    .word 8
trampoline_root:
    .long 0
trampoline_protected:
    .long 0
trampoline_end:
    .text
    // What follows may be in the same unit.
    .code64
