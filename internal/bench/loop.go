package main

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"syscall"
)

// loopBuffer is what the bare loop copies at once.
const loopBuffer = 1 * mib

// loopEnd is one end of the bare loop, the least that can move a file: pread and write to TCP here, read from TCP
// and pwrite there, and fdatasync at the end, since a migration ends with one too. With one more argument, "sum", each
// end also takes the CRC32C of what it copies, as a migration does.
func loopEnd(end string, args []string) error {
	touch := func([]byte) {}
	if n := len(args); n > 0 && args[n-1] == "sum" {
		args = args[:n-1]
		sum, table := uint32(0), crc32.MakeTable(crc32.Castagnoli)
		touch = func(b []byte) { sum = crc32.Update(sum, table, b) }
	}
	switch {
	case end == "loop-receive" && len(args) == 1:
		return loopReceive(args[0], touch)
	case end == "loop-send" && len(args) == 2:
		return loopSend(args[0], args[1], touch)
	}
	return fmt.Errorf("%s %v: want loop-receive FILE or loop-send FILE ADDRESS, and perhaps sum", end, args)
}

func loopReceive(path string, touch func([]byte)) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close() // after fdatasync it has nothing to say
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("ready %s\n", ln.Addr())
	conn, err := ln.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	buf := make([]byte, loopBuffer)
	for off := int64(0); ; {
		n, err := io.ReadFull(conn, buf)
		if n > 0 {
			touch(buf[:n])
			if _, err := f.WriteAt(buf[:n], off); err != nil {
				return err
			}
			off += int64(n)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if err := syscall.Fdatasync(int(f.Fd())); err != nil {
		return err
	}
	_, err = conn.Write([]byte{1}) // it is there
	return err
}

func loopSend(path, address string, touch func([]byte)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	buf := make([]byte, loopBuffer)
	for off := int64(0); ; {
		n, err := f.ReadAt(buf, off)
		touch(buf[:n])
		if _, err := conn.Write(buf[:n]); err != nil {
			return err
		}
		off += int64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, buf[:1])
	return err
}
