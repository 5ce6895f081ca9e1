/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A guest in 512 bytes.
 *
 * Counts its starts in sector 1 of its own disk, then waits for the ACPI power button, counts the
 * clean stop in sector 2 and switches the machine off. A count is 32 bits, little endian, at the
 * start of the sector. It runs in real mode on SeaBIOS and QEMU's q35, whose power management
 * registers are at 0x600.
 *
 *   as --defsym DEAF=1   ignores the power button: only a kill ends it.
 *   as --defsym ONCE=1   stops at once, as if the button had been pressed.
 */
        .code16
        .globl  _start

        .set    PM1_STATUS, 0x600
        .set    PM1_ENABLE, 0x602
        .set    PM1_CONTROL, 0x604
        .set    POWER_BUTTON, 0x0100
        .set    SLEEP_S5, 0x2000
        .set    STARTS, 1
        .set    STOPS, 2
        .set    BUFFER, 0x8000

_start: cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x7c00, %sp
        ljmp    $0, $begin
begin:  mov     %dl, drive

        mov     $STARTS, %ax
        call    count

        /* The power button is polled: its interrupt (9) has no handler here. */
        in      $0xa1, %al
        or      $2, %al
        out     %al, $0xa1
        mov     $PM1_ENABLE, %dx
        mov     $POWER_BUTTON, %ax
        out     %ax, %dx

        /* The timer's interrupt ends each hlt, 18 times a second. */
wait:
.ifndef ONCE
        sti
        hlt
.ifdef DEAF
        jmp     wait
.endif
        mov     $PM1_STATUS, %dx
        in      %dx, %ax
        test    $POWER_BUTTON, %ax
        jz      wait
.endif

        mov     $STOPS, %ax
        call    count
        mov     $PM1_CONTROL, %dx
        mov     $SLEEP_S5, %ax
        out     %ax, %dx
halt:   hlt
        jmp     halt

        /* One more in the sector %ax. A disk that fails halts the guest, and nothing is counted. */
count:  mov     %ax, sector
        mov     $0x42, %ah
        call    disk
        incl    BUFFER
        mov     $0x4300, %ax
        call    disk
        ret

disk:   mov     $packet, %si
        mov     drive, %dl
        int     $0x13
        jc      halt
        ret

        /* int 13h, AH=42h/43h: size, sectors, offset, segment, first sector. */
        .balign 4
packet: .byte   16, 0
        .word   1, BUFFER, 0
sector: .long   0, 0
drive:  .byte   0

        .org    510
        .word   0xaa55
