package protocol

import (
	"encoding/binary"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/protocol/wire"
	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// Whatever is malformed ends the connection with an error that says what it was.
func TestMalformedPacketsEndTheConnection(t *testing.T) {
	info := frame(1, 1, devInfo(1<<20, 4096))
	header := func(n uint32, first ...byte) []byte {
		return cat(le32(1), le32(2), le32(n), first)
	}
	for name, v := range map[string]struct {
		bytes []byte
		want  error
		says  string
	}{
		"packet of length 0":             {cat(info, header(0)), nil, "length 0"},
		"frame of 4 GiB":                 {cat(info, header(0xffffffff, 2)), wire.ErrTooLarge, "WriteAt packet of 4294967295 bytes"},
		"event of 4 GiB":                 {cat(info, header(0xffffffff, 7)), wire.ErrTooLarge, "Event packet of 4294967295 bytes"},
		"NeedAt of 1 MiB":                {cat(info, header(1<<20, 3)), wire.ErrTooLarge, "NeedAt"},
		"unknown command":                {cat(info, frame(1, 2, []byte{0x7f, 1, 2})), ErrUnknownCommand, "0x7f"},
		"unknown long command":           {cat(info, header(1<<30, 0x2a)), ErrUnknownCommand, "0x2a"},
		"unknown response":               {cat(info, frame(1, 2, []byte{0xee})), ErrUnknownCommand, "0xee"},
		"later DeviceGroupInfo":          {frame(0, 1, []byte{0x0d}), ErrUnknownCommand, "DeviceGroupInfo"},
		"later ReadByHash":               {cat(info, frame(1, 2, []byte{0x0e})), ErrUnknownCommand, "ReadByHash"},
		"WriteAt first":                  {frame(9, 1, writeAt(0, fill(512, 1))), ErrNoDevInfo, "device 9: WriteAt packet of 522 bytes"},
		"event first":                    {frame(9, 1, []byte{7, 4}), ErrNoDevInfo, "Event"},
		"NeedAt of no device":            {frame(9, 1, ranged(3, 0, 512)), ErrNoDevInfo, "NeedAt"},
		"NeedAt of the peer's":           {cat(info, frame(1, 2, ranged(3, 0, 512))), ErrNoDevInfo, "NeedAt"},
		"second DevInfo":                 {cat(info, info), ErrUnexpected, "second DevInfo"},
		"DevInfo of 19 bytes cut":        {frame(1, 1, devInfo(1, 1)[:18]), wire.ErrShort, "DevInfo packet of 18 bytes"},
		"size over 63 bits":              {frame(1, 1, devInfo(-1, 1)), wire.ErrTooLarge, "18446744073709551615"},
		"WriteAt cut in its head":        {cat(info, frame(1, 2, []byte{2, 0, 1})), wire.ErrShort, "WriteAt packet of 3 bytes"},
		"WriteAt of one byte":            {cat(info, frame(1, 2, []byte{2})), wire.ErrShort, "WriteAt packet of 1 bytes"},
		"WriteAt of no type":             {cat(info, frame(1, 2, []byte{2, 99, 0, 0, 0, 0, 0, 0, 0, 0})), wire.ErrInvalid, "type 99"},
		"run-length bomb":                {cat(info, frame(1, 2, cat([]byte{2, 2}, le64(0), []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0}))), wire.ErrTooLarge, "WriteAt"},
		"unterminated varint":            {cat(info, frame(1, 2, cat([]byte{2, 2}, le64(0), []byte{0x80, 0x80}))), wire.ErrShort, "WriteAt"},
		"ReadAt cut":                     {cat(info, frame(1, 2, []byte{1, 0})), wire.ErrShort, "ReadAt"},
		"NeedAt too long":                {cat(info, frame(1, 2, append(ranged(1, 0, 1), 0))), wire.ErrTrailing, "ReadAt"},
		"DirtyList of 9 bytes":           {cat(info, frame(1, 2, cat([]byte{5}, le32(4096), le32(1)))), wire.ErrShort, "DirtyList packet of 9 bytes"},
		"DirtyList of block size 0":      {cat(info, frame(1, 2, cat([]byte{5}, le32(0), le32(0)))), wire.ErrInvalid, "block size 0"},
		"DirtyList longer than the disk": {cat(info, frame(1, 2, cat([]byte{5}, le32(1<<30), le32(2), le32(0), le32(0)))), wire.ErrInvalid, "a list of 2 blocks"},
		"DirtyList outside":              {cat(info, frame(1, 2, cat([]byte{5}, le32(4096), le32(1), le32(256)))), wire.ErrInvalid, "block 256"},
		"Hashes outside":                 {cat(info, frame(1, 2, cat([]byte{8}, le32(256), fill(32, 0)))), wire.ErrInvalid, "block 256"},
		"Hashes cut":                     {cat(info, frame(1, 2, fill(30, 8))), wire.ErrShort, "Hashes"},
		"event of no type":               {cat(info, frame(1, 2, []byte{7, 6})), wire.ErrInvalid, "event 6"},
		"packet after RemoveDev":         {cat(info, frame(1, 2, []byte{0x0a}), frame(1, 3, []byte{7, 0})), ErrUnexpected, "removed"},
		"RemoveDev too long":             {cat(info, frame(1, 2, []byte{0x0a, 0})), wire.ErrTrailing, "RemoveDev"},
		"end inside a header":            {cat(info, header(1)[:7]), io.ErrUnexpectedEOF, ""},
		"end behind a header":            {cat(info, header(1)), io.ErrUnexpectedEOF, ""},
		"end inside a WriteAt":           {cat(info, frame(1, 2, writeAt(0, fill(512, 1)))[:100]), io.ErrUnexpectedEOF, ""},
		"end inside a WriteAt head":      {cat(info, frame(1, 2, writeAt(0, fill(512, 1)))[:15]), io.ErrUnexpectedEOF, ""},
		"end inside a list":              {cat(info, header(1<<20, 5), fill(1000, 0)), io.ErrUnexpectedEOF, ""},
		"end between two packets":        {info, io.EOF, ""},
		"something else, e.g. HTTP":      {[]byte("GET / HTTP/1.1\r\nHost: example\r\n\r\n"), ErrUnknownCommand, ""},
		"something else, e.g. a TLS":     {cat([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, fill(200, 0)), ErrUnknownCommand, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				raw, p, ended := destination(t, sources.NewMemoryStorage(1<<20))
				go func() {
					_, _ = raw.conn.Write(v.bytes) // it may be refused half-way
					_ = raw.conn.Close()
				}()
				err := <-ended
				require.Error(t, err)
				if v.want != nil {
					require.ErrorIs(t, err, v.want)
				}
				require.ErrorContains(t, err, v.says)
				require.Equal(t, err, p.Err())
				require.NoError(t, p.Close())
				require.Zero(t, p.Stats().Received, "all memory is given back")
			})
		})
	}
}

// What is well-formed and cannot be done is refused, and the connection lives.
func TestWritesThatCannotBeAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := destination(t, sources.NewMemoryStorage(8192))
		raw.mustSend(1, 1, devInfo(8192, 4096))
		later := vectors(t, "v0.2.21")
		id := uint32(1)
		for name, v := range map[string]struct{ body, answer []byte }{
			"past the end":         {writeAt(8192, fill(1, 1)), []byte{0x84}},
			"over the end":         {writeAt(4097, fill(4096, 1)), []byte{0x84}},
			"1 TiB past the end":   {writeAt(1<<40, fill(4096, 1)), []byte{0x84}},
			"before the start":     {writeAt(-4096, fill(4096, 1)), []byte{0x84}},
			"wraps 64 bits":        {writeAt(1<<63-1, fill(4096, 1)), []byte{0x84}},
			"a run over the end":   {cat([]byte{2, 2}, le64(4096), []byte{0x83, 0x40, 0}), []byte{0x84}},
			"empty":                {writeAt(0, nil), written(0)},
			"an empty run":         {cat([]byte{2, 2}, le64(0)), written(0)},
			"by hash":              {vectors(t, "v0.1.5")["WriteAt.hash"], []byte{0x84}},
			"by hash, later":       {later["WriteAt.hash"], []byte{0x84}},
			"by hash, base image":  {later["WriteAt.hash.base"], []byte{0x84}},
			"already have":         {later["WriteAt.youalreadyhave"], []byte{0x84}},
			"gzip":                 {later["WriteAt.gzip.mixed"], []byte{0x84}},
			"zeroes":               {later["WriteAt.zeroes.mixed"], []byte{0x84}},
			"mapped":               {later["WriteAtWithMap"], []byte{0x84}},
			"read past the end":    {ranged(1, 8192, 1), []byte{0x82}},
			"read negative length": {ranged(1, 0, -1), []byte{0x82}},
			"read negative offset": {ranged(1, -2, 1), []byte{0x82}},
			"read of nothing":      {ranged(1, 0, 0), cat([]byte{0x81}, le32(0))},
		} {
			id++
			raw.mustSend(1, id, v.body)
			require.Equal(t, packet{1, id, v.answer}, raw.next(), name)
		}
		// These have no answer and do no harm.
		raw.mustSend(1, id+1, later["RemoveFromMap"])
		raw.mustSend(1, id+2, later["AlternateSources"])
		raw.mustSend(1, id+3, writeAt(0, fill(4096, 7)))
		raw.expect(1, id+3, written(4096))
		require.NoError(t, p.Err())
	})
}

// P1: a million devices are refused at the limit.
func TestAMillionDevicesAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, ended := destination(t, nil)
		go func() {
			for dev := range uint32(1 << 20) {
				if raw.send(dev, dev+1, devInfo(4096, 4096)) != nil {
					return
				}
			}
		}()
		require.ErrorIs(t, <-ended, ErrTooMany)
		require.Len(t, p.devices, defaultMaxDevices)
	})
}

// P1: requests that nobody has answered yet are bounded in number and memory.
func TestAMillionUnansweredRequestsAreBounded(t *testing.T) {
	for name, v := range map[string]struct {
		body  []byte
		error bool // else the reader stops reading
	}{
		"events":     {[]byte{7, 0}, true},
		"hashes":     {[]byte{8}, true},
		"lists":      {cat([]byte{5}, le32(4096), le32(0)), true},
		"writes":     {writeAt(0, fill(4096, 1)), false},
		"runs":       {cat([]byte{2, 2}, le64(0), []byte{0x81, 0x40, 0}), false},
		"bad writes": {vectors(t, "v0.1.5")["WriteAt.hash"], false},
		"reads":      {ranged(1, 0, 4096), false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				raw, p, ended := destination(t, nil, Options{Memory: 4 << 20}) // nobody takes the device
				raw.mustSend(1, 1, devInfo(4096, 4096))
				var sent int
				gone := make(chan struct{})
				go func() {
					defer close(gone)
					for sent = range 1 << 20 {
						if raw.send(1, uint32(sent+2), v.body) != nil {
							return
						}
					}
				}()
				synctest.Wait()
				require.LessOrEqual(t, p.Stats().Received, int64(4<<20))
				if v.error {
					require.ErrorIs(t, <-ended, ErrTooMany)
				} else {
					require.Empty(t, ended, "a peer that only sends much is made to wait")
					require.NoError(t, p.Close())
				}
				<-gone
				require.Less(t, sent, 5000)
				require.Zero(t, p.Stats().Received)
			})
		})
	}
}

// P1: a device is announced with as much text as a packet may have, or sends
// events that are acted on slowly, or requests that are refused: all of it counts
// against the memory, for however many devices, and no more is read when that is
// used up.
func TestWhatWaitsCountsAgainstTheMemory(t *testing.T) {
	announced := func(raw *rawPeer, dev uint32) error { return raw.send(dev, 1, devInfo(4096, 4096)) }
	event := cat([]byte{7, 5, 0}, fill(readBuffer-3, 1))
	for name, send := range map[string]func(raw *rawPeer, dev, id uint32) error{
		"DevInfos": func(raw *rawPeer, dev, id uint32) error {
			if id > 2 {
				return nil
			}
			body, err := (&wire.DevInfo{Name: strings.Repeat("n", 65535), Schema: strings.Repeat("s", wire.MaxSchema)}).AppendBinary(nil)
			require.NoError(raw.t, err)
			return raw.send(dev, 1, body)
		},
		"events": func(raw *rawPeer, dev, id uint32) error {
			if id == 2 {
				return announced(raw, dev)
			}
			return raw.send(dev, id, event)
		},
		"refused runs": func(raw *rawPeer, dev, id uint32) error {
			if id == 2 {
				return announced(raw, dev)
			}
			return raw.send(dev, id, cat([]byte{2, 2}, le64(1<<40), []byte{0x81, 0x40, 0}))
		},
		"refused reads": func(raw *rawPeer, dev, id uint32) error {
			if id == 2 {
				return announced(raw, dev)
			}
			return raw.send(dev, id, ranged(1, 1<<40, 1))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const memory = 8 << 20
				raw, p, ended := destination(t, nil, Options{Memory: memory}) // nobody takes the devices
				stopped := make(chan bool)
				go func() {
					for dev := range uint32(memory / memoryPerDevice) {
						for id := range uint32(200) {
							if send(raw, dev, id+2) != nil {
								stopped <- true
								return
							}
						}
					}
					stopped <- false
				}()
				before := heap()
				synctest.Wait()
				require.Empty(t, ended, "a peer that sends much is made to wait")
				require.InDelta(t, memory, p.Stats().Received, memory*7/8)
				require.Less(t, heap(), before+2*memory)
				require.NoError(t, p.Close())
				require.True(t, <-stopped)
				require.Zero(t, p.Stats().Received)
			})
		})
	}
}

// P1: an event that is answered late counts until it is.
func TestAnEventCountsUntilItIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &lateAnswers{MemoryStorage: sources.NewMemoryStorage(4096), answers: make(chan func(error), 10)}
		raw, p, _ := destination(t, store)
		raw.mustSend(1, 1, devInfo(4096, 4096))
		raw.mustSend(1, 2, cat([]byte{7, 5, 0}, fill(30<<10, 1)))
		raw.mustSend(1, 3, []byte{7, 0})
		synctest.Wait()
		require.Equal(t, int64(32<<10+minCharge), p.Stats().Received)
		answer := <-store.answers
		answer(nil)
		answer(nil)
		raw.expect(1, 2, []byte{0x85})
		synctest.Wait()
		require.Equal(t, int64(minCharge), p.Stats().Received)
		(<-store.answers)(nil)
		raw.expect(1, 3, []byte{0x85})
		synctest.Wait()
		require.Zero(t, p.Stats().Received)
	})
}

// lateAnswers leaves the answers to events to the test.
type lateAnswers struct {
	*sources.MemoryStorage
	answers chan func(error)
}

func (l *lateAnswers) HandleEvent(_ *wire.Event, answer func(error)) { l.answers <- answer }

// P1: the text of a DevInfo is not kept when the device is open.
func TestAnOpenDeviceKeepsNoSchema(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, _ := destination(t, nil)
		for dev := range uint32(100) {
			var got DevInfo
			from := NewFromProtocol(dev, func(di *DevInfo) storage.StorageProvider {
				got = *di
				return sources.NewMemoryStorage(4096)
			}, p)
			body, err := (&wire.DevInfo{Size: 4096, BlockSize: 512, Name: "d", Schema: strings.Repeat("s", wire.MaxSchema)}).AppendBinary(nil)
			require.NoError(t, err)
			raw.mustSend(dev, 1, body)
			synctest.Wait()
			require.Len(t, got.Schema, wire.MaxSchema, "the factory sees it")
			require.Equal(t, &wire.DevInfo{Size: 4096, BlockSize: 512}, from.in.announcedInfo())
			require.Zero(t, p.Stats().Received)
		}
	})
}

// P1: a queue that was long once is not kept for every device that had one.
func TestALongQueueIsNotKept(t *testing.T) {
	var q queue
	for range 4 {
		for i := range uint32(maxUnanswered) {
			q.push(job{id: i})
		}
		for i := range uint32(maxUnanswered) {
			require.Equal(t, i, q.pop().id)
		}
		require.LessOrEqual(t, len(q.ring), maxKeptJobs)
	}
}

// P1: the length of a list is believed only as its bytes come.
func TestAListIsNotAllocatedOnItsLengthAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, p, ended := destination(t, sources.NewMemoryStorage(4096))
		raw.mustSend(1, 1, devInfo(4096, 4096))
		synctest.Wait()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		b := frame(1, 2, []byte{5})
		binary.LittleEndian.PutUint32(b[8:], 64<<20)
		_, err := raw.conn.Write(b)
		require.NoError(t, err)
		synctest.Wait()
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(4<<20))
		require.NoError(t, p.Close())
		require.ErrorIs(t, <-ended, ErrClosed)
	})
}

// P1: 16 bytes that stand for 1 GiB go through a piece of memory.
func TestARunOfAGibibyteIsNotExpanded(t *testing.T) {
	raw, p, _ := destination(t, &discard{size: 1 << 30})
	raw.mustSend(1, 1, devInfo(1<<30, 65536))
	for id, value := range map[uint32]byte{2: 0, 3: 0x41} {
		raw.mustSend(1, id, cat([]byte{2, 2}, le64(0), []byte{0x81, 0x80, 0x80, 0x80, 0x08, value}))
		require.Equal(t, packet{1, id, written(1 << 30)}, raw.next())
		require.Less(t, p.Stats().Received, int64(4<<20))
	}
}

// discard is a store that keeps nothing and checks what it is given.
type discard struct {
	sources.MemoryStorage
	size uint64
}

func (d *discard) Size() uint64                            { return d.size }
func (d *discard) ZeroAt(int64, int64, bool) error         { return nil }
func (d *discard) ReadAt(p []byte, off int64) (int, error) { return len(p), nil }
func (d *discard) WriteAt(p []byte, off int64) (int, error) {
	if len(p) > chunk {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}

// P7: a name reaches the factory as it came, for it to judge; to refuse the
// device ends the connection and does not print the name raw.
func TestAHostileNameIsTheFactorysToRefuse(t *testing.T) {
	for _, name := range []string{"../../etc/passwd", "a\x00b\x1b[2J", "\xff\xfe", strings.Repeat("x", 65535)} {
		synctest.Test(t, func(t *testing.T) {
			src, dst := pair(t, nil)
			var got string
			NewFromProtocol(1, func(di *DevInfo) storage.StorageProvider {
				got = di.Name
				return nil
			}, dst)
			require.NoError(t, NewToProtocol(512, 1, src).SendDevInfo(name, 512, ""))
			<-dst.Done()
			require.Equal(t, name, got)
			require.ErrorIs(t, dst.Err(), ErrRefused)
			require.NotContains(t, dst.Err().Error(), "\x1b")
			require.Less(t, len(dst.Err().Error()), 400)
		})
	}
}
