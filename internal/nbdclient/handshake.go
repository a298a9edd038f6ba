package nbdclient

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
)

// The numbers of the NBD protocol that this client uses; the names are those
// of the specification.
const (
	magicInit     = 0x4e42444d41474943 // NBDMAGIC
	magicOption   = 0x49484156454f5054 // IHAVEOPT
	magicOptReply = 0x3e889045565a9

	flagFixedNewstyle = 1 << 0 // NBD_FLAG_FIXED_NEWSTYLE
	flagNoZeroes      = 1 << 1 // NBD_FLAG_NO_ZEROES

	optStartTLS = 5 // NBD_OPT_STARTTLS
	optGo       = 7 // NBD_OPT_GO

	repAck  = 1       // NBD_REP_ACK
	repInfo = 3       // NBD_REP_INFO
	repErr  = 1 << 31 // the bit that makes a reply an error

	infoExport    = 0 // NBD_INFO_EXPORT
	infoBlockSize = 3 // NBD_INFO_BLOCK_SIZE

	transReadOnly        = 1 << 1 // NBD_FLAG_READ_ONLY
	transSendFlush       = 1 << 2 // NBD_FLAG_SEND_FLUSH
	transSendFUA         = 1 << 3 // NBD_FLAG_SEND_FUA
	transSendTrim        = 1 << 5 // NBD_FLAG_SEND_TRIM
	transSendWriteZeroes = 1 << 6 // NBD_FLAG_SEND_WRITE_ZEROES
)

// Limits on what a server may make us read in the handshake.
const (
	maxOptionReply = 64 << 10
	maxReplies     = 128
	maxExportName  = 4096
)

// errNames says in words what the error replies of the handshake mean.
var errNames = map[uint32]string{
	repErr | 1: "the option is not supported",
	repErr | 2: "refused by policy",
	repErr | 3: "the request is invalid",
	repErr | 5: "the server wants TLS: want a URI of nbds:// or nbds+unix://",
	repErr | 6: "there is no such export",
	repErr | 7: "the server is shutting down",
	repErr | 8: "the server wants block sizes to be negotiated",
	repErr | 9: "the request is too big",
}

// export is what the server said about the export.
type export struct {
	size       uint64
	flags      uint16
	minBlock   uint32 // what offsets and lengths are multiples of, in bytes; 0 if the server did not say
	maxPayload uint32 // largest READ or WRITE, in bytes; 0 if the server did not say
}

// negotiate speaks the fixed newstyle handshake and enters transmission of the
// export by NBD_OPT_GO. With secure, what follows the greeting is spoken over
// the connection that it returns.
func negotiate(conn net.Conn, name string, secure func() (net.Conn, error)) (net.Conn, export, error) {
	if len(name) > maxExportName {
		return nil, export{}, fmt.Errorf("the export name has %d bytes, more than the %d that NBD allows", len(name), maxExportName)
	}
	if err := greet(conn); err != nil {
		return nil, export{}, err
	}
	if secure != nil {
		over, err := secure()
		if err != nil {
			return nil, export{}, err
		}
		conn = over
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, 1)
	b = binary.BigEndian.AppendUint16(b, infoBlockSize)
	sendErr := sendOption(conn, optGo, b)
	if sendErr != nil && secure == nil {
		return nil, export{}, fmt.Errorf("asking for export %q: %w", name, sendErr)
	}
	// A server that refuses our certificate may hang up before we have written;
	// what it said about it can still be read.
	e, err := readGoReplies(conn, name)
	if err == nil {
		err = sendErr
	}
	if err != nil && secure != nil && !errors.As(err, new(*refusal)) && !isTimeout(err) {
		// In TLS 1.3 a server looks at the client's certificate after the
		// client thinks that all is well.
		err = fmt.Errorf("%w; after a TLS handshake that means most often that the server does not accept our certificate: its log says why", err)
	}
	return conn, e, err
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// greet reads the server's greeting and answers it.
func greet(rw io.ReadWriter) error {
	var greeting [18]byte
	if _, err := io.ReadFull(rw, greeting[:]); err != nil {
		return fmt.Errorf("reading the greeting: %w", unexpected(err))
	}
	if binary.BigEndian.Uint64(greeting[0:]) != magicInit || binary.BigEndian.Uint64(greeting[8:]) != magicOption {
		return errors.New("the peer is no NBD server that speaks the newstyle handshake")
	}
	offered := binary.BigEndian.Uint16(greeting[16:])
	if offered&flagFixedNewstyle == 0 {
		return errors.New("the server does not speak the fixed newstyle handshake")
	}
	if _, err := rw.Write(binary.BigEndian.AppendUint32(nil, uint32(offered&(flagFixedNewstyle|flagNoZeroes)))); err != nil {
		return fmt.Errorf("answering the greeting: %w", err)
	}
	return nil
}

func sendOption(w io.Writer, opt uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := w.Write(append(b, data...))
	return err
}

// startTLS asks for TLS, and returns when the server waits for its first word.
func startTLS(rw io.ReadWriter) error {
	if err := sendOption(rw, optStartTLS, nil); err != nil {
		return fmt.Errorf("asking for TLS: %w", err)
	}
	typ, data, err := readOptionReply(rw, optStartTLS)
	switch {
	case err != nil:
		return fmt.Errorf("asking for TLS: %w", err)
	case typ == repAck:
		return nil
	case typ == repErr|1, typ == repErr|2:
		return errors.New("the server has no TLS: want a URI of nbd:// or nbd+unix://, or a server with TLS")
	}
	return fmt.Errorf("asking for TLS: %w", newRefusal(typ, data))
}

// refusal is an error that the server answered to an option.
type refusal struct{ why string }

func (e *refusal) Error() string { return e.why }

func newRefusal(typ uint32, data []byte) *refusal {
	why, known := errNames[typ]
	if !known {
		why = fmt.Sprintf("error %#x", typ)
	}
	if len(data) > 0 {
		why += fmt.Sprintf(" (the server says: %q)", data)
	}
	return &refusal{why}
}

// readGoReplies reads the answers to NBD_OPT_GO up to the acknowledgement.
func readGoReplies(r io.Reader, name string) (export, error) {
	var e export
	seen := false
	for range maxReplies {
		typ, data, err := readOptionReply(r, optGo)
		switch {
		case err != nil:
			return export{}, fmt.Errorf("reading the answer about export %q: %w", name, err)
		case typ&repErr != 0:
			return export{}, fmt.Errorf("export %q: %w", name, newRefusal(typ, data))
		case typ == repAck:
			if !seen {
				return export{}, fmt.Errorf("export %q: the server did not tell the size", name)
			}
			return e, nil
		case typ == repInfo && len(data) >= 2:
			switch info := binary.BigEndian.Uint16(data); {
			case info == infoExport && len(data) == 12:
				e.size, e.flags, seen = binary.BigEndian.Uint64(data[2:]), binary.BigEndian.Uint16(data[10:]), true
			case info == infoBlockSize && len(data) == 14:
				e.minBlock, e.maxPayload = binary.BigEndian.Uint32(data[2:]), binary.BigEndian.Uint32(data[10:])
			}
		}
	}
	return export{}, fmt.Errorf("export %q: more than %d answers to one request", name, maxReplies)
}

// readOptionReply reads one reply of the handshake.
func readOptionReply(r io.Reader, opt uint32) (typ uint32, data []byte, err error) {
	var head [20]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, unexpected(err)
	}
	if binary.BigEndian.Uint64(head[0:]) != magicOptReply || binary.BigEndian.Uint32(head[8:]) != opt {
		return 0, nil, fmt.Errorf("that is no answer to option %d", opt)
	}
	length := binary.BigEndian.Uint32(head[16:])
	if length > maxOptionReply {
		return 0, nil, fmt.Errorf("an answer of %d bytes is more than the %d that make sense", length, maxOptionReply)
	}
	data = make([]byte, length)
	if _, err := io.ReadFull(r, data); err != nil {
		return 0, nil, unexpected(err)
	}
	return binary.BigEndian.Uint32(head[12:]), data, nil
}

// unexpected turns the end of the stream into the error that it is here.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the server closed the connection")
	}
	return err
}
