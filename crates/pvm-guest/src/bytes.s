# The functions that the compiler calls for bytes in memory, as the C library of a program would have them.

    .text

    .globl memcpy
    .globl memmove
memmove:
    mov rcx, rdi
    sub rcx, rsi
    cmp rcx, rdx
    jb 1f                           # the source's end lies in the destination: backwards
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
1:  mov rax, rdi
    mov rcx, rdx
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret

    .globl memset
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret

    .globl memcmp
    .globl bcmp
memcmp:
bcmp:
    mov rcx, rdx
    cmp rcx, rcx
    repe cmpsb
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    je 2f
    sub eax, ecx
    ret
2:  xor eax, eax
    ret
